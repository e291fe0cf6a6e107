// What a packed file holds, for people and for programs.

#ifndef FIRESTEEL_TOOLS_CONVERT_REPORT_H_
#define FIRESTEEL_TOOLS_CONVERT_REPORT_H_

#include <cstdint>
#include <string>

#include "runtime/checkpoint/packed_file.h"

namespace firesteel::convert {

/// "2.6 GiB"; bytes as they are below 1 KiB.
std::string FormatBytes(uint64_t bytes);
/// "31.7 M".
std::string FormatCount(uint64_t count);

/// A summary and one line a part.
std::string ToTable(const PackedFile& file);
/// One JSON object: the file, its configuration, its generation defaults, its parts. Checksums are
/// strings of 16 hexadecimal digits.
std::string ToJson(const PackedFile& file);

}  // namespace firesteel::convert

#endif  // FIRESTEEL_TOOLS_CONVERT_REPORT_H_
