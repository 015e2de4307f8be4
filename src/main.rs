//! The program `forkvol`: all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    forkvol::cli::main()
}
