"""The algorithms: each one explicit generator of metrics, in the order of its theory."""
