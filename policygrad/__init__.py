"""policygrad: the policy-gradient family of reinforcement learning, whole, in one PyTorch library."""
