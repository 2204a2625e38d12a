"""Subcommands of `flynn-host`. spec/host.md section 17."""
