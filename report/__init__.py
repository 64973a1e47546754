"""What is measured of answers and of training, and how it is shown: scores, tables, pictures, pages."""


class ReportError(ValueError):
    """Something cannot be drawn; the message names the file or the item, the value and what to do."""
