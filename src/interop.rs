//! Files of other projects.
