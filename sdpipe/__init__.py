"""Train residual networks with stochastic depth, fold, export, prove and deploy them."""
