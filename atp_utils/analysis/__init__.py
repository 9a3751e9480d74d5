"""From recorded decisions to tables and figures: no model, no request."""
