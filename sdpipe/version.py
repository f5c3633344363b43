"""The one home of the version: packaging reads it, the deployed file carries it."""

__version__ = "0.1.0"
