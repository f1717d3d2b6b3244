"""The sampler of expected hypervolume improvement, with Gaussian processes.

To read in this order: `sampler` asks `batch_planner` for rows; that asks `acquisition` for the expected improvement of
rows which `nsga2` finds on the posteriors of `models`. Posteriors are Gaussian processes (`gaussian_process`) of
transformed costs (`outcome_transforms`) over `features` of rows; `exit_costs` gives prior means where thresholds of
exits are solved inside of each evaluation. `encoding` turns parameters into rows, `observations` trials into arrays;
`prior` holds what is known before anything is measured, and `knapsack` what to try first because of it.
`prediction_errors` compares what models predicted of proposals with what was measured.

Shapes: `n` rows of `d` dimensions, `m` objectives as costs (less is better), `k` features or other rows.
"""
