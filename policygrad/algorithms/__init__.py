"""The algorithms. Each is one explicit generator of metrics, in the order sample, credit, update."""
