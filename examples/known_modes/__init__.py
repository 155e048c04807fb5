"""A synthetic language whose modes are known, so that losing one can be counted."""
