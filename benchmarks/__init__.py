"""What hvmodel costs, each time against C that does the same work: `python -m benchmarks NAME|all [--json]`."""
