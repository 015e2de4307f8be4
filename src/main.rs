//! The program `forkvol`: all of it is in the library.

fn main() {
    forkvol::sys::process::end(forkvol::cli::main())
}
