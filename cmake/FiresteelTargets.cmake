# The three kinds of target. Sources are listed by hand in each folder's CMakeLists.txt, and every
# library states what its header shows (PUBLIC) and what only its sources use (PRIVATE).

include(GoogleTest)

# firesteel_library(name SOURCES … [PUBLIC …] [PRIVATE …]): libfiresteel_<name>, alias firesteel::<name>.
function(firesteel_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(firesteel_${name} STATIC ${ARG_SOURCES})
  add_library(firesteel::${name} ALIAS firesteel_${name})
  target_include_directories(firesteel_${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(firesteel_${name} PUBLIC ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
  target_compile_options(firesteel_${name} PRIVATE ${FIRESTEEL_WARNINGS})
endfunction()

# firesteel_program(name OUTPUT file SOURCES … LINK …): build/<preset>/bin/<file>.
function(firesteel_program name)
  cmake_parse_arguments(ARG "" "OUTPUT" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES OUTPUT_NAME ${ARG_OUTPUT})
  target_link_libraries(${name} PRIVATE ${ARG_LINK})
  target_compile_options(${name} PRIVATE ${FIRESTEEL_WARNINGS})
endfunction()

# firesteel_test(name SOURCES … LINK … [LABELS label]): a GoogleTest program, one ctest entry a case. The
# label is that of the top folder where none is given; CMakePresets.json selects by it.
function(firesteel_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gmock GTest::gtest_main)
  target_compile_options(${name} PRIVATE ${FIRESTEEL_WARNINGS})
  target_compile_definitions(${name} PRIVATE FIRESTEEL_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  if(NOT ARG_LABELS)
    file(RELATIVE_PATH folder ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
    string(REGEX REPLACE "/.*" "" ARG_LABELS ${folder})
  endif()
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 900)
endfunction()

# firesteel_benchmark(name SOURCES … LINK …): a Google Benchmark program; built, never run by ctest.
function(firesteel_benchmark name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} benchmark::benchmark_main)
  target_compile_options(${name} PRIVATE ${FIRESTEEL_WARNINGS})
endfunction()
