"""HTTP, once for all: the server every daemon uses, the client every neighbour uses.

Only this package knows aiohttp.
"""
