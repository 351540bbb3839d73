"""Who owns which slot. No torch in this room."""
