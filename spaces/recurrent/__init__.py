"""Recurrent networks that leave out updates of their state: trained for it, or by a predictor beside them."""
