"""The PostgreSQL appliance.

`configuration.py` renders the server's files (pure), `workplace.py` writes them, `postmaster.py` is the server as a
child process, `queries.py` what is asked of it by SQL, `following.py` makes its data follow another server's;
`server.py` makes it a `Database` for sirenia, `provisioning.py` gives apps their own databases, `main.py` has the two
daemons: `flynn-postgres` beside the server and `flynn-postgres api`, the provider.
"""
