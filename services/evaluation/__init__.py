"""How close the policy's answers are to the human ones, measured from outside the adversarial game."""
