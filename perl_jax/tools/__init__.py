"""Commands around training: planning, inspecting tasks, reports, sweeps, averaging, export and import."""
