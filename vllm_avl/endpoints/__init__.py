"""What `/avl/...` answers: configuration, totals, requests, and the page."""
