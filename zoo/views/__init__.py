"""Costs to look at: pages that need no network, rows for a spreadsheet, differences, fronts."""
