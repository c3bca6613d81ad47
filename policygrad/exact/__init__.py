"""Small worlds in closed form: the ground truth for every estimator."""
