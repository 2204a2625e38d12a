"""The state machine of replicated databases, shared by every database appliance.

`cluster_state.py` is the document all peers agree on, `evaluate.py` the rules (pure), `peer.py` the loop that follows
the directory, applies the rules and moves the local database, `database.py` what a database has to offer for that,
`management.py` the HTTP surface of a database process and `client.py` how others speak to it.

Built now: clusters of one (`singleton`). A cluster of several peers needs more rules in `evaluate.py` (sync, async,
takeover) and a `Database` that replicates; document, loop and HTTP surface stay.
"""
