# How everything of ours is compiled. Included once, from the top.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

set(FIRESTEEL_SANITIZE "" CACHE STRING "Sanitizers of the whole build: address,undefined or thread; empty for none")
if(FIRESTEEL_SANITIZE)
  add_compile_options(-fsanitize=${FIRESTEEL_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${FIRESTEEL_SANITIZE})
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Warnings are errors in our own code only: generated and system code never sees these.
set(FIRESTEEL_WARNINGS -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wno-psabi -Wno-missing-field-initializers -Werror)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  list(APPEND FIRESTEEL_WARNINGS -Wthread-safety)
else()
  # GCC 12 sees overlapping copies in its own std::string (GCC bug 105651).
  list(APPEND FIRESTEEL_WARNINGS -Wno-restrict)
endif()
