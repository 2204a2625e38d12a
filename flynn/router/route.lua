-- What HAProxy's own rules cannot say. Runs for few requests only.
--
-- `flynn_route` finds the pool of a request that the plain look-up of `<host><path>/` did not: wildcards, the catch-all, and hosts
-- and paths that are not written the way the map has them. The rules are those of `table.match`.
--
-- There is one map per port class; the action takes the number of one.
--
-- `flynn_hop_by_hop` removes the headers that a `Connection` header names, and that header (RFC 9110, 7.6.1).

local LONGEST = 4000 -- characters of a path that can matter

local maps = {}
for number, file in ipairs({@MAPS@}) do
    maps[number] = Map.new(file, Map._beg)
end

local function normal_host(text)
    return (text:match("^[^:]*"):lower():gsub("%.+$", ""))
end

local function normal_path(text)
    local decoded = text:sub(1, LONGEST):gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
    return (("/" .. decoded .. "/"):gsub("/+", "/"))
end

core.register_action("flynn_route", {"http-req"}, function(txn, number)
    local routes = maps[tonumber(number)]
    local host = normal_host(txn.f:req_fhdr("host") or "")
    local path = normal_path(txn.f:path() or "")
    local pool = routes:lookup(host .. path)
    local suffix = host
    while not pool and suffix and suffix ~= "" do
        pool = routes:lookup("*." .. suffix .. path)
        suffix = suffix:match("^[^.]*%.(.*)$")
    end
    pool = pool or routes:lookup("*" .. path)
    if pool then
        txn:set_var("txn.pool", pool)
    end
end, 1)

-- A client must not take away what frames or addresses the request.
local essential = {host = true, ["content-length"] = true, ["transfer-encoding"] = true}

core.register_action("flynn_hop_by_hop", {"http-req"}, function(txn)
    local lines = txn.http:req_get_headers()["connection"] or {}
    for _, line in pairs(lines) do
        for name in line:lower():gmatch("[^%s,]+") do
            if not essential[name] then
                txn.http:req_del_header(name)
            end
        end
    end
    txn.http:req_del_header("connection")
end)
