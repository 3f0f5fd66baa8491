"""What runs in an API server: requests and answers, `/avl/...`, and the page."""
