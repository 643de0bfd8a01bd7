"""Everything that changes a picture: functions of a model."""
