"""Classifier, images and noise -> votes, on one device or many.

`forward` runs the classifier, `batches` says what happens to one batch, `stream` to a list of tasks, `run` fills a
record, here or on `workers`. `smoothed` is the smoothed classifier with a method for each question, `cascade` that of
several scales.
"""
