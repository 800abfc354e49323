"""What the project's own training runs need: data, models, tasks and rivals. Not part of the wheel."""
