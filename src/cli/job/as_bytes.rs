//! Paths in a job's file and documents, in the form that byte strings have there: text where they are text.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serializer};

use crate::cli::output;
use crate::protocol::Bytes;

fn path(bytes: Bytes) -> PathBuf {
    OsString::from_vec(bytes.0).into()
}

/// One path.
pub mod one {
    use super::*;

    pub fn serialize<S: Serializer>(value: &std::path::Path, to: S) -> Result<S::Ok, S::Error> {
        serde::Serialize::serialize(&output::path(value), to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Bytes::deserialize(from).map(path)
    }
}

/// One, or none.
pub mod maybe {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        let bytes = value.as_deref().map(output::path);
        serde::Serialize::serialize(&bytes, to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
        Option::<Bytes>::deserialize(from).map(|bytes| bytes.map(path))
    }
}

/// Any number.
pub mod many {
    use super::*;

    pub fn serialize<S: Serializer>(value: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(value.iter().map(|path| output::path(path)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
        Vec::<Bytes>::deserialize(from).map(|all| all.into_iter().map(path).collect())
    }
}
