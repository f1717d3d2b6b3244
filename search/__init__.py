"""From a budget to a deployable network: propose versions, measure them, keep the front, hand one over."""
