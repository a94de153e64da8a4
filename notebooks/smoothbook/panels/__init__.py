"""Interactive panels for notebooks, one a file: look, move a slider, see what votes say.

`base`, `live` and `job` hold what they share. A panel is a VBox with a few validated traits; its picture comes from a
pure function of arrays and records, which papermill and tests call without a browser.
"""
