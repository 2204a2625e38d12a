"""Containers: a zygote that forks inits, the inits themselves, and the asyncio side the daemon talks to.

`spec` says what a container is, `runtime` starts, finds again and ends them. Everything else is inside.
"""
