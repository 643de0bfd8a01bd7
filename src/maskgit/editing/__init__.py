"""Everything that changes an image: functions of a model."""
