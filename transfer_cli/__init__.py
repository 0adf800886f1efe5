"""`transfer`: transfer learning and domain adaptation, config-driven, under one honest protocol."""

__version__ = "0.1.0"
