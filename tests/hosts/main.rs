//! What is in `scripts/hosts`, used as the hosts use it. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

mod buildkite;
mod host;
mod service;

/// The folder of this program, for PATH.
fn program_folder() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_forkvol")).parent().unwrap()
}

/// The checkout that is tested, as cargo says when it runs this: what it said when it built this may have been another one, where
/// several share a target folder.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .expect("cargo runs the tests")
        .into()
}

fn scripts() -> PathBuf {
    root().join("scripts/hosts")
}

/// PATH with this program first.
fn path_variable() -> String {
    let usual = std::env::var("PATH").unwrap();
    format!("{}:{usual}", program_folder().display())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Both outputs of a command that must do well.
#[track_caller]
fn well(output: &Output) -> String {
    let all = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{}: {all}", output.status);
    all
}
