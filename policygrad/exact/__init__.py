"""Small worlds in closed form: the oracle that every estimator is held against."""
