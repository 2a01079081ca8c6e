"""Backends that compute the part of a step that is larger than k×k."""
