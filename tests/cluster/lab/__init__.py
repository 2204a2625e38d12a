"""The development cluster: real nodes on one machine, each with a network, mount and process namespace of its own.

It is what `make cluster` starts and what the cluster tests run against. A node's first process stands in for systemd;
when it is killed the kernel ends everything in the node at once, which is how a power cut is simulated.
"""
