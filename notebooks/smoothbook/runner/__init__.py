"""Run the notebooks with papermill, build the gallery of their figures, write workshop copies, check exercises."""
