"""Who runs next. No torch in this room."""
