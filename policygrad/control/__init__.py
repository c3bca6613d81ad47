"""The world of control: Gymnasium environments, and policies for their spaces."""
