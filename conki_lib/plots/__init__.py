"""Every figure of the project: one style in `conki_lib.plots.style`, one module per subject."""
