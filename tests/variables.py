"""A module that holds what a test's programs share."""

VALUE = 0.0
