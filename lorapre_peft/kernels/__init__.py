"""This package holds the backends, which compute the part of a step that is larger than k×k."""
