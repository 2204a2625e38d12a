"""Services of jobs in discoverd: probing ports, and keeping the healthy ones registered. spec/host.md section 9."""
