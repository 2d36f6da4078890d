"""The operations under the names and in the conventions of other libraries; import the module you need."""
