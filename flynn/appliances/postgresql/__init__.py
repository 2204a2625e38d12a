"""The PostgreSQL appliance.

`configuration.py` renders the server's files (pure), `postmaster.py` is the server as a child process, `server.py`
makes it a `Database` for sirenia, `provisioning.py` gives apps their own databases, `main.py` has the two daemons:
`flynn-postgres` beside the server and `flynn-postgres api`, the provider.
"""
