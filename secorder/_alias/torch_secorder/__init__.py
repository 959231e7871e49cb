"""secorder under the import name that its documentation uses."""
