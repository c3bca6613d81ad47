"""`policygrad verify`: is an estimator right, and how noisy is it? Each is held against the exact gradient."""
