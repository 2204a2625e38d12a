"""The state machine of replicated databases, shared by every database appliance.

Rules, pure: `cluster_state.py` is the document all peers agree on, `evaluate.py` says what a peer has to do,
`takeover.py` on what evidence a new generation may be declared, `suspicion.py` when a neighbour is taken for dead.

Shell: `peer.py` follows the directory, asks the neighbours, applies the rules and moves the local database;
`database.py` is what a database has to offer for that, `management.py` the HTTP surface of a database process,
`client.py` how others speak to it.
"""
