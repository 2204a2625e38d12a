"""The node's side of container networking: bridge, address pool, packet filter."""
