"""Weights of other libraries: read, written, and told apart; docs/conversion.md says what is carried."""
